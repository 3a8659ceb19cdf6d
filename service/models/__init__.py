"""The rooms. `MODELS` is the only list of models in the project."""

from service.models.detection import DETECTION
from service.models.digit import DIGIT
from service.models.generator import GENERATOR
from service.models.image import IMAGE
from service.models.sentiment import SENTIMENT
from service.models.spec import Room

MODELS: dict[str, Room] = {room.name: room for room in (DIGIT, IMAGE, SENTIMENT, GENERATOR, DETECTION)}
