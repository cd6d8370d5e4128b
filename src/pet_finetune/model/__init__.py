"""The PET potential: network, per-species baseline, scale, short-range repulsion, derivatives."""
