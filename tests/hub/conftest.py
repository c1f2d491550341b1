"""The fixtures of hub_fixtures.py, for every test of this room."""

from hub_fixtures import client, hub  # noqa: F401
