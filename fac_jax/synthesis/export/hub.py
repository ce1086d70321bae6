"""A written data set folder to the Hugging Face hub: private while it is filled, and opened last, if at all.

The key is the one that huggingface_hub finds in the environment (HF_TOKEN); none is read or stored here. The gate in
the card of a data set about harm holds only where access requests are switched on, so the request that opens such a
repository is the one that switches them on, with access granted by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fac_jax.errors import UserError, first_line


def push(folder: Path, repository: str, public: bool, gated: bool) -> str:
    """Upload the folder; returns the address. Raises UserError for what the hub refuses, or a repository that everyone
    sees when it was not said that everyone may."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    gate: Literal["manual"] | None = "manual" if gated else None
    try:
        there = api.repo_exists(repository, repo_type="dataset")
        seen = there and not api.dataset_info(repository).private
        if seen and not public:
            raise UserError(f"{repository} is on the hub and everyone sees it: say --public, or name another one")
        if seen and gated:
            api.update_repo_settings(repository, repo_type="dataset", gated=gate)
        if not there:
            api.create_repo(repository, repo_type="dataset", private=True)
        api.upload_folder(
            repo_id=repository, repo_type="dataset", folder_path=folder, delete_patterns=["data/*"],
            commit_message="Samples exported by fac_jax",
        )  # fmt: skip
        if public:
            api.update_repo_settings(repository, repo_type="dataset", private=False, gated=gate)
    except OfflineModeIsEnabled:
        raise UserError(f"{folder} is written, but HF_HUB_OFFLINE is set: unset it and push again") from None
    except LocalTokenNotFoundError:
        raise UserError(f"{folder} is written, but there is no key for the hub: set HF_TOKEN and push again") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{folder} is written, but the hub gave {type(error).__name__} for {repository} ({first_line(error)}): "
            "check the name and that HF_TOKEN may write there, and push again"
        ) from None
    return f"{api.endpoint}/datasets/{repository}"
