"""Checkpoints: our format, metatrain's (read only, nothing executed), and the oldest start."""
