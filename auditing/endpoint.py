"""Models behind an HTTP address, as black boxes: texts by the completions interface that most servers have, images by a POST.

The address is always the user's own choice, and requests are held to a rate. Audit only what you may query: heavy use can break a
provider's terms, and answers to an audit's inputs may be logged there.
"""

import io
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image

from .access import AuditError, Capability
from .image_model import LEVELS_OF_A_FILE
from .model_server import Answer, Call, Tensors, verb

MAX_ANSWER_BYTES = 1 << 24
SECONDS_PER_MINUTE = 60.0


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers, and how it may be asked.

    Attributes:
        url: the full address that requests go to, such as "http://localhost:8000/v1/completions".
        requests_per_minute: the rate that is never exceeded.
        kind: "text": the server takes `{"model", "prompt", "max_tokens", …}` and answers `{"choices": [{"text"}]}`. "image": it
            takes the bytes of a PNG file and answers a list of `{"label", "score"}` or of places, best first.
        model: name that the server knows the model by.
        image_size: height and width of the images that are sent.
        token_variable: environment variable with the bearer token, if the server wants one; it is never written down.
        timeout: seconds that the server may take for an answer.
    """

    url: str
    requests_per_minute: float
    kind: str = "text"
    model: str = ""
    image_size: tuple[int, int] = (224, 224)
    token_variable: str = ""
    timeout: float = 60.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint url={self.url!r} is no address: give it in full, with http:// or https://")
        if parts.username or parts.password:
            raise ValueError("endpoint: the url holds a password, which reports would show; use token_variable=")
        if not self.requests_per_minute > 0:
            raise ValueError(f"endpoint: requests_per_minute={self.requests_per_minute} must be a positive number")
        if self.kind not in ("text", "image"):
            raise ValueError(f"endpoint: kind={self.kind!r} is neither 'text' nor 'image'")
        if self.token_variable and not os.environ.get(self.token_variable):
            raise ValueError(f"endpoint: the environment variable {self.token_variable} is not set")
        object.__setattr__(self, "image_size", tuple(self.image_size))


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Goes to no other address than the one that was given, to which the token would go along."""

    def redirect_request(self, *request: Any) -> None:
        return None


class EndpointModel:
    """What both kinds share: requests at a rate, and an identity without files."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.kind = endpoint, endpoint.kind
        self._next = 0.0
        self._opener = urllib.request.build_opener(_StayHere)

    def info(self) -> dict[str, Any]:
        size = {"image_size": list(self.endpoint.image_size)} if self.kind == "image" else {}
        return {"kind": self.kind, "model_type": "endpoint", **size}

    def identity(self) -> dict[str, Any]:
        settings = {**asdict(self.endpoint), "image_size": list(self.endpoint.image_size)}
        return {"name": self.endpoint.url, "settings": settings, "files": {}}

    def end_scope(self) -> None:
        """Nothing is kept or changed."""

    def post(self, content: bytes, content_type: str) -> Any:
        """JSON that the server answers. Waits for the rate's sake. Raises `AuditError` if it fails."""
        wait = self._next - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        self._next = time.monotonic() + SECONDS_PER_MINUTE / self.endpoint.requests_per_minute
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        if self.endpoint.token_variable:
            headers["Authorization"] = f"Bearer {os.environ[self.endpoint.token_variable]}"
        request = urllib.request.Request(self.endpoint.url, content, headers)
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout) as response:
                data = response.read(MAX_ANSWER_BYTES + 1)
            if len(data) > MAX_ANSWER_BYTES:
                raise ValueError(f"the answer is larger than {MAX_ANSWER_BYTES:,} bytes")
            return json.loads(data)
        except (OSError, ValueError) as error:
            raise AuditError(f"{self.endpoint.url} does not answer as it should: {error}") from error

    def malformed(self, answer: Any) -> AuditError:
        return AuditError(f"{self.endpoint.url} answers something else than was expected: {str(answer)[:200]}")


class TextEndpoint(EndpointModel):
    """A server with the completions interface."""

    @verb(Capability.QUERY)
    def generate(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """As `TextModel.generate`. A request counts 1 per sample: nothing is known of the server's cache."""
        prompts, samples = list(arguments["prompts"]), int(arguments["samples"])
        call.spend(forward=len(prompts) * samples)
        return [self._complete(prompt, samples, arguments) for prompt in prompts], {}

    def _complete(self, prompt: str, samples: int, arguments: dict[str, Any]) -> list[str]:
        wanted = {
            "prompt": prompt,
            "n": samples,
            "max_tokens": int(arguments["max_new_tokens"]),
            "temperature": float(arguments["temperature"]),
            "top_p": float(arguments["top_p"]),
            "seed": int(arguments["seed"]),
            **({"stop": list(arguments["stop"])} if arguments["stop"] else {}),
            **({"model": self.endpoint.model} if self.endpoint.model else {}),
        }
        answer = self.post(json.dumps(wanted).encode(), "application/json")
        try:
            texts = [str(choice["text"]) for choice in answer["choices"]]
        except (KeyError, TypeError) as error:
            raise self.malformed(answer) from error
        if len(texts) != samples:
            raise self.malformed(answer)
        return texts


class ImageEndpoint(EndpointModel):
    """A server that takes the bytes of an image."""

    @verb(Capability.QUERY)
    def prepare(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Pictures uint8 [height, width, 3] -> images [pictures, 3, *image_size], scaled without regard to their shape."""
        height, width = self.endpoint.image_size
        images = []
        for name in sorted(tensors):
            picture = Image.fromarray(tensors[name].numpy()).resize((width, height), Image.Resampling.BICUBIC)
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            images.append(pixels.reshape(height, width, 3).permute(2, 0, 1) / LEVELS_OF_A_FILE)
        return None, {"images": torch.stack(images)}

    @verb(Capability.QUERY)
    def answer(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """The best answer to each image, without its score."""
        images = tensors["images"]
        if images.ndim != 4 or images.shape[1] != 3 or not 0 <= float(images.min()) <= float(images.max()) <= 1:
            raise ValueError("images must be [images, 3, height, width], between 0 and 1")
        call.spend(forward=len(images))
        levels = (images * LEVELS_OF_A_FILE).round().byte().permute(0, 2, 3, 1).numpy()
        return [self._ask(picture) for picture in levels], {}

    def _ask(self, picture: Any) -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        answer = self.post(file.getvalue(), "image/png")
        if not isinstance(answer, list) or not answer or not isinstance(answer[0], dict):
            raise self.malformed(answer)
        return {key: value for key, value in answer[0].items() if key not in ("score", "error_radius_km")}


def open_endpoint(endpoint: Endpoint) -> EndpointModel:
    return (TextEndpoint if endpoint.kind == "text" else ImageEndpoint)(endpoint)


__all__ = ["Endpoint", "EndpointModel", "open_endpoint"]
