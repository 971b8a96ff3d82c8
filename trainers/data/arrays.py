"""The values of a `.json` file, a list of rows or rows one after the other, as they come: none but
the one that is read is in memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from puna.core.documents import LONGEST, parse_json

PIECE = 1 << 20  # bytes that are read at a time
REMEDY = "expected a list of objects, or one object after the other"
BLANKS = " \t\r\n"
NEAR = 10  # characters before the end in which a word or an escape may be cut


def json_values(file: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    """(`name: row number`, value) of each. Raises ValueError for what is no JSON, and where a list
    does not end."""
    text = Text(file, name)
    is_list = text.begins_with("[")
    number = 0
    while not text.ends():
        if is_list and _list_ends(text, number):
            return
        if text.ends():  # behind a comma
            break
        number += 1
        yield f"{name}: row {number}", text.value(f"{name}: row {number}")
    if is_list:
        raise ValueError(f"{name}: the list does not end (after row {number}); fetch it again")


def _list_ends(text: "Text", number: int) -> bool:
    """Whether a list ends after `number` rows; where not, the comma before the next is passed."""
    if text.begins_with("]"):
        if not text.ends():
            raise ValueError(f"{text.name}: something follows the list; {REMEDY}")
        return True
    if number == 0:
        return False
    if not text.begins_with(","):
        raise ValueError(f"{text.name}: no comma follows row {number} of the list; put one there")
    if text.begins_with("]"):
        raise ValueError(
            f"{text.name}: a comma follows the last row, {number}, and no other row; take the "
            "comma out, or fetch the file again where rows are missing"
        )
    return False


class Text:
    """The text of a file, of which a part is in memory: `held` from `place` on is still to come."""

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name = file, name
        self.held, self.place = "", 0
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.parse = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Read on, as much as there is already; False at the end of the file."""
        piece = self.file.read(max(PIECE, len(self.held) - self.place))
        try:
            text = self.decode(piece, not piece)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name}: not UTF-8, expected UTF-8 text") from error
        self.held, self.place = self.held[self.place :] + text, 0
        return bool(piece)

    def ends(self) -> bool:
        """Whether nothing is left but blanks."""
        while True:
            while self.place < len(self.held) and self.held[self.place] in BLANKS:
                self.place += 1
            if self.place < len(self.held):
                return False
            if not self.more():
                return True

    def begins_with(self, sign: str) -> bool:
        """Whether `sign` comes next; it is passed over."""
        if self.ends() or self.held[self.place] != sign:
            return False
        self.place += 1
        return True

    def value(self, where: str) -> Any:
        """The value that comes next."""
        while True:
            try:
                found, self.place = self.parse(self.held, self.place)
                return found
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.held) - NEAR
                if cut and len(self.held) - self.place < LONGEST and self.more():
                    continue
            except (RecursionError, ValueError):  # nested too deeply; a number too long
                pass
            rest = self.held[self.place :]
            parse_json(rest.encode("utf-8", "surrogatepass"), where, REMEDY)
            raise ValueError(f"{where}: not JSON; {REMEDY}")
