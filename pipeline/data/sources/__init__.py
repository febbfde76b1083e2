"""Sources of images, a file each. A new one is one more file, and one more line here.

A source is a function of where it lies (what stands behind the colon), the options and a ledger, which it tells about
every file that it meets; it returns its splits by name, "" where there is but one. `tars` differs: its shards exist,
and are scanned where they lie.
"""

from collections.abc import Callable

from pipeline.data.ledger import Ledger
from pipeline.data.sources.base import Options, Sample, Source
from pipeline.data.sources.cifar import cifar10, cifar100
from pipeline.data.sources.digits import digits
from pipeline.data.sources.folder import folder
from pipeline.data.sources.synthetic import synthetic

__all__ = ["ARGUMENTS", "SOURCES", "USAGE", "Ledger", "Options", "Sample", "Source"]

ARGUMENTS = {"digits": "", "synthetic": "[1-9][0-9]{0,8}"}
"""What may stand behind the colon, where it is no place: regular expressions."""
SOURCES: dict[str, Callable[[str, Options, Ledger], dict[str, Source]]] = {
    "imagefolder": folder,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": digits,
    "synthetic": synthetic,
}
USAGE = "imagefolder:PATH | cifar10:PATH | cifar100:PATH | webdataset:GLOB | digits | synthetic:N"
