from grist_kernels.moe.reference import moe  # noqa: F401
