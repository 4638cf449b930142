"""The literate toolchain: chapters become notebooks and modules, and stay in step."""
