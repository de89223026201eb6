"""Grids of methods, controls and seeds over tasks: what adaptation did, against what, and how sure that is."""
