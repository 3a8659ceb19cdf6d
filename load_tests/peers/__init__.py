"""Other ways to serve the same network, to measure the service beside."""

from service.models.digit import DIGIT
from service.providers import profile_of
from service.repository import ModelFiles, Repository
from service.runtime import Network
from service.settings import Settings


def served_digit(settings: Settings) -> tuple[ModelFiles, Network]:
    """The very file that the service takes for the digit, in the session that it opens, warmed."""
    profile = profile_of(settings)
    files = Repository(settings.models).open(DIGIT.name, None, profile.variants)
    network = Network(DIGIT, files.network, profile, files.variant, files.card)
    network.warm_up(DIGIT.to_tensor(DIGIT.example))
    return files, network
