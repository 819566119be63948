"""Losses of this package inside other people's training loops."""
