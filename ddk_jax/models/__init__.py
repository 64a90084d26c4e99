"""One decoder, described by a ModelSpec, and the tables of the families that it covers."""
