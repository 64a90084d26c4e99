"""What a config would need and do on a TPU slice that need not exist: `ddk plan`."""
