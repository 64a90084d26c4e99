"""What a run did: its record, the figures and the report drawn from it."""
