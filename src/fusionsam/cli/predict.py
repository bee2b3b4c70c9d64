"""The command `fusionsam predict`."""

from __future__ import annotations

from fusionsam.inference.options import PredictOptions as Options


def main(options: Options) -> int:
    """Predict files, folders, tables of pairs or films, and say where the results are."""
    if options.video:
        from fusionsam.inference import video

        count, rate, film, code = video.run(options)
        print(f"{count} frames, {rate:.2f} frames per second -> {film}")
        return code
    if options.manifest is not None:
        from fusionsam.inference import archive

        done, code = archive.run(options)
    else:
        from fusionsam.inference import files

        done, code = files.run(options)
    print(f"{done} pair{'s' * (done != 1)} -> {options.out}")
    return code
