"""Sources of images, a file each. A new one is one more file, and one more line here.

A source is a function of where it lies (what stands behind the colon), the options and a ledger, which it tells about
every file that it meets; it returns its splits by name, "" where there is but one. `tars` differs: its shards exist,
and are scanned where they lie.
"""

from collections.abc import Callable

from pipeline.data.ledger import Ledger
from pipeline.data.sources import cifar, digits, folder, idx, parquet, synthetic
from pipeline.data.sources.base import Options, Source

ARGUMENTS = {"digits": "", "synthetic": "[1-9][0-9]{0,8}"}
"""What may stand behind the colon, where it is no place: regular expressions."""
ANYWHERE = ("parquet",)
"""Those that read URLs too."""
SOURCES: dict[str, Callable[[str, Options, Ledger], dict[str, Source]]] = {
    "imagefolder": folder.folder,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "idx": idx.idx,
    "parquet": parquet.parquet,
    "digits": digits.digits,
    "synthetic": synthetic.synthetic,
}
USAGE = (
    "imagefolder:PATH | cifar10:PATH | cifar100:PATH | idx:PATH | webdataset:PATTERN | parquet:PATTERN | digits | "
    "synthetic:N"
)
