"""Version of the package; read as text by the build, so it imports nothing."""

__version__ = "0.1.0"
