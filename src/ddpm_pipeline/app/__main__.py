"""A model in the browser: `python -m ddpm_pipeline.app MODEL`, or written as a Hugging Face Space."""

import sys
from pathlib import Path

from ..support.errors import only_errors_of, reported_errors
from .options import parse_options


def main() -> None:
    with reported_errors("stopped"):
        options = parse_options(sys.argv[1:])
        source, server, publishing = options.source, options.server, options.publishing
        if publishing.space is not None:
            from .space import push_space, write_space  # needs no gradio

            folder = write_space(source.model, publishing.space)
            source_of_model = "with the model" if Path(source.model).is_dir() else f"which loads {source.model} from the Hub"
            print(f"{folder} holds the Space, {source_of_model}.", file=sys.stderr)
            if publishing.push_space is not None:
                print(push_space(folder, publishing.push_space, publishing.private))
            return
        from . import serve  # after parsing, so that --help and mistakes take no seconds

        only_errors_of("diffusers")
        serve(source.model, server.host, server.port, server.share, source.num_cpu_threads)


if __name__ == "__main__":
    main()
