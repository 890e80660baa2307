"""Networks stored in folders in Hugging Face's format: ``config.json`` with the arguments, ``model.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_OF_TIMM = ("architecture", "pretrained_cfg", "model_args")  # what timm reads from a configuration
_OF_THE_HUB = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class SavedInFolder(PyTorchModelHubMixin):
    """Reads what ``save_pretrained`` of Hugging Face's mixin wrote, from folders only, and rejects what doesn't fit.

    Attributes:
        needs: the argument without which a configuration isn't one of this class.
    """

    needs: ClassVar[str]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """The network that :meth:`save_pretrained` wrote, in evaluation mode. Nothing is downloaded.

        Args:
            pretrained_model_name_or_path: the folder.
            **kwargs: arguments of the network, overriding those in ``config.json``; ``map_location``: device to load
                to; ``strict=False``: leave parameters that are missing from the file unchanged and ignore unknown ones.

        Raises:
            FileNotFoundError: there is no such folder, or it lacks ``config.json`` or ``model.safetensors``. Pickled
                weights, which could run arbitrary code, are not read.
            ValueError: the configuration can't be read, or weights don't fit the network; the message names them.
        """
        folder = Path(pretrained_model_name_or_path)
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise FileNotFoundError(
                    f"pretrained_model_name_or_path: expected a folder with {CONFIG} and {WEIGHTS}, "
                    f"found no {file} in {folder} (pickled weights are not read)"
                )
        try:
            config = json.loads((folder / CONFIG).read_text())
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: expected JSON, {error}") from error
        if not isinstance(config, dict) or cls.needs not in config:
            raise ValueError(f"{folder / CONFIG}: expected the arguments of a {cls.__name__}, got {config!r}")
        return super().from_pretrained(folder, **kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **kwargs: Any) -> Self:
        """Called by the mixin, with the configuration and its Hub arguments."""
        arguments = {name: value for name, value in kwargs.items() if name not in (*_OF_THE_HUB, *_OF_TIMM)}
        model: Any = cls(**arguments)  # an nn.Module, which the mixin itself is not
        model.to(map_location)
        file = Path(model_id) / WEIGHTS
        try:
            weights = load_file(file, device=map_location)
        except SafetensorError as error:
            raise ValueError(f"{file}: expected safetensors, {error}") from error
        try:
            model.load_state_dict(weights, strict=strict)
        except RuntimeError as error:  # names everything missing, unknown or of another shape
            raise ValueError(f"{file}: weights of another network. {error}") from error
        return model.eval()
