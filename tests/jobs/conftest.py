"""A tiny model in a folder, as the command line's tests have it."""

from tests.cli.conftest import command, model_folder, run

__all__ = ["command", "model_folder", "run"]
