"""Decisions as pure functions: a frozen snapshot in, a decision out. Nodes, simulator and tests call the same ones."""
