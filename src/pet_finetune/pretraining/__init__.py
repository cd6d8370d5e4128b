"""Continued pre-training: the foundation learns the user's system at a cheap level of theory.

Frames are explored with the foundation itself, thinned, labelled by a teacher, and trained on.
"""
