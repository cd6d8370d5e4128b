"""Structures, neighbour lists and batches; ASE and files are met here and nowhere above."""
