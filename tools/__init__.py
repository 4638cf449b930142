"""The literate toolchain: chapters become notebooks and modules, in step."""
