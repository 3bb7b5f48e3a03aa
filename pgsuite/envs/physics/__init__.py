"""Simulators of rigid bodies behind one protocol."""
