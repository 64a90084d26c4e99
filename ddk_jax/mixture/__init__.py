"""What the next rows are drawn from: gaps to weights (controllers), weights to rows (schedule).

Pure numpy on the host: no input/output, no logging, no configuration, no clock.
"""
