"""What every room uses and no reader needs to open: files, units, progress, the machine."""
