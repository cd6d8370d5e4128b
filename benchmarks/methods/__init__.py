"""Every way to fine-tune on the same sets: errors, sizes, costs, and the sweep of the defaults."""
