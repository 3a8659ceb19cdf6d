"""What can go wrong in training that the person at the keyboard can mend."""


class TrainingError(Exception):
    """Wrong data, a wrong setting or a broken checkpoint, said in one sentence.

    `python -m training` prints the sentence and ends with exit code 2.
    """
