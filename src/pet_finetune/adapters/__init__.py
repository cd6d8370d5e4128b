"""Low-rank adapters: where they go, how they train, merge, and how they are kept on disk."""
