"""Images become files and back.

Owns: the file format, symbols and their streams, the codec of whole images, the commands' work on files.
May import: models, data, registry, storage.
"""
