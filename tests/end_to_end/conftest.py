"""The local Hub of hub_fixtures.py."""

from hub_fixtures import client, hub  # noqa: F401
