"""Hub: an exported folder on the Hugging Face hub."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from bisam import __version__
from bisam.experiments.errors import is_out_of_memory, reason

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class Hub:
    """A repository of a user on the hub, which may not exist yet.

    Args:
        name: of the repository, USER/NAME.
        private: whether only the user may see it.

    Raises:
        ValueError: the name is none, huggingface_hub is missing, there is no token, or the hub cannot be reached.
    """

    def __init__(self, name: str, private: bool = False) -> None:
        if not _NAME.fullmatch(name) or len(name) > 96:
            raise ValueError(f"--push-to-hub {name} is no name of a repository: write it as USER/NAME")
        try:
            package: Any = import_module("huggingface_hub")
        except ImportError as error:
            raise ValueError("--push-to-hub needs huggingface_hub: pip install 'bisam[hub]'") from error
        self.name, self._private = name, private
        self._api = package.HfApi()
        self._call("whoami")  # before anything is written

    def push(self, folder: Path) -> str:
        """Upload the files of a folder in one commit, and return the address of the repository.

        Raises:
            ValueError: it cannot be created or written, or it is public and was to be private.
        """
        url = self._call("create_repo", self.name, private=True if self._private else None, exist_ok=True)
        if self._private and not self._call("model_info", self.name).private:
            raise ValueError(
                f"{self.name} exists and is public: nothing was uploaded; leave --private out, or give another name"
            )
        self._call(
            "upload_folder",
            repo_id=self.name,
            folder_path=str(folder),
            commit_message=f"Model exported by bisam {__version__}",
        )
        return str(url)

    def _call(self, function: str, *arguments: Any, **named: Any) -> Any:
        try:
            return getattr(self._api, function)(*arguments, **named)
        # The hub, its client and its transport raise a dozen unrelated types.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            message = reason(error).rstrip(" .:")
            raise ValueError(
                f"{self.name} cannot be pushed to the hub ({message}): log in with `hf auth login` or set HF_TOKEN to "
                "a token that may write, and check the network"
            ) from error
