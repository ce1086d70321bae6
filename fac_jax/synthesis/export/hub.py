"""A written data set folder to the Hugging Face hub: closed first, filled, and opened last.

The key is the one that huggingface_hub finds in the environment (HF_TOKEN); none is read or stored here. For a data set
about harm, access by hand is switched on before anything is uploaded: the card says what access is for, the switch
makes that hold.
"""

from __future__ import annotations

from pathlib import Path

from fac_jax.errors import UserError, first_line


def push(folder: Path, repository: str, public: bool, gated: bool) -> str:
    """Upload the folder; returns the address. Raises UserError for what the hub refuses, or a repository that others
    see when it was not said that they may."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        there = api.repo_exists(repository, repo_type="dataset")
        if there and not public and not api.dataset_info(repository).private:
            raise UserError(
                f"{repository} is on the hub and everyone sees it: say --public, or name another repository"
            )
        if not there:
            api.create_repo(repository, repo_type="dataset", private=True)
        if gated:
            api.update_repo_settings(repository, repo_type="dataset", gated="manual")
        api.upload_folder(
            repo_id=repository, repo_type="dataset", folder_path=folder, delete_patterns=["data/*"],
            commit_message="Samples exported by fac_jax",
        )  # fmt: skip
        if public:
            api.update_repo_settings(repository, repo_type="dataset", private=False)
    except OfflineModeIsEnabled:
        raise UserError(f"{folder} is written, but HF_HUB_OFFLINE is set: unset it and push again") from None
    except LocalTokenNotFoundError:
        raise UserError(f"{folder} is written, but there is no key for the hub: set HF_TOKEN and push again") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{folder} is written, but the hub gave {type(error).__name__} for {repository} ({first_line(error)}): "
            "check the name and that HF_TOKEN may write there, and push again"
        ) from None
    return f"https://huggingface.co/datasets/{repository}"
