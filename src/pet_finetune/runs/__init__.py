"""A run's folder: claimed by one process, found again, gone on with."""
