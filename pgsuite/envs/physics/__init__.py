"""Rigid-body back ends behind one protocol."""
