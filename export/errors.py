"""Why nothing was exported, said in one sentence.

ExportError
├── ExportRefused   something must be mended first   exit code 2
└── ProofFailed     the file is not the network      exit code 1
"""


class ExportError(Exception):
    """Base of both; the model repository is as it was."""


class ExportRefused(ExportError):
    """The checkpoint, the data or the repository is not as it should be."""


class ProofFailed(ExportError):
    """The exported file is not the network. Says what differs, by how much, and what would be right."""
