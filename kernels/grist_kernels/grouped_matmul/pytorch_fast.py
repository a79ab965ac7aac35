from grist_kernels.grouped_matmul.reference import grouped_matmul  # noqa: F401
