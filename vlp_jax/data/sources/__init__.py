"""Random-access data sets, one file each; each exports `Source`.

A Source is a frozen dataclass of plain fields with

  len(source)            number of examples; never 0
  source.read(indices)   a list of raw examples, one for each of int [n]
  source.captions(indices)   all their captions, a list of str, without the images

and a raw example is a dict of

  image: bytes of a JPEG, PNG, GIF, BMP or WEBP file; or of an .npz of regions, where
    they are read in its place (data/regions.py)
  captions: list of str, or of bytes that should be UTF-8; one is drawn in training
  image_id: int; examples with the same number show the same image
  key: str, the file's or the record's name, for messages
  error: str, only where the record could not be read: why, in the same few words for
    all of a kind, to count by
  words: list of str, only of data that knows: the words that the image decides
  label: int, image2: bytes, answers: {text: weight}: only of data of a task; see
    data/columns.py

A source of tasks also has source.notes(indices), what the official evaluation of
answers wants of a question; see task.py.

`read` is called by several threads at once.
"""
