"""Other ways to serve the same network, to measure the service beside."""

import os

from service.models import MODELS
from service.models.spec import Room
from service.providers import profile_of
from service.repository import ModelFiles, Repository
from service.runtime import Network
from service.settings import Settings


def room_to_serve() -> Room:
    """The room of the model that `PEER_MODEL` names; the digit, if nothing does."""
    return MODELS[os.environ.get("PEER_MODEL") or "digit"]


def served(room: Room, settings: Settings) -> tuple[Room, ModelFiles, Network]:
    """A room with its assets, the files that the service takes, and the session that it opens, warmed."""
    profile = profile_of(settings)
    files = Repository(settings.models).open(room.name, None, profile.variants)
    room = files.furnish(room)
    network = Network(room, files.network, profile, files.variant, files.card)
    network.warm_up(room.to_tensor(room.example))
    return room, files, network
