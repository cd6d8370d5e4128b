"""What watches and keeps what the foundation knew: retention, replay, anchors, dimer curves."""
