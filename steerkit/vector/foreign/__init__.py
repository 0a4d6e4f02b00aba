"""Vectors in the files of other programs: recognised by content, read without running anything, made into ours.

`kinds` tells what a file is, one file reads each format (`gguf_file`, `svec_file`, `npy_file`, `tensor_file`,
`torch_file`), and `importing` puts what they hold together with what the model says.
"""
