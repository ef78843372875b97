# Copyright 2026 The hf_source team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What an attributor gives to other people: scores in a folder, scores on the Hub, a page."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from accelerate import Accelerator

from ..paths import checked_path
from .queries import Queries


class Shared:
    """Writes what was attributed, or attributes it first."""

    accelerator: Accelerator

    def save(
        self,
        folder: str | Path,
        queries: Queries | None = None,
        stages: Iterable[str] | None = None,
        k: int = 10,
        *,
        include_rows: bool = True,
        max_columns: int = 100,
        shaded: int | None = None,
    ) -> Path:
        """Write scores, strongest rows and queries to a folder with a card: what `push_to_hub` publishes.

        `hf_source.load_attribution(folder)` reads it, and `datasets.load_dataset(folder, "top_influences")` a config.

        Args:
            folder: to write to.
            queries, stages, k, max_columns, shaded: see `push_to_hub`.
            include_rows: write the rows too; else their numbers only.

        Returns:
            The folder.

        Raises:
            ConfigError: if nothing was attributed and no queries are given.
        """
        checked_path(folder, "Saving scores", "pass the folder to write to")
        from ..outputs.attribution_files import save_attribution
        from ..outputs.sharing import collect

        settings = {"texts": None if include_rows else (), "max_columns": max_columns, "shaded": shaded}
        found = collect(self, queries, stages, k, **settings)
        if self.accelerator.is_main_process:
            save_attribution(found, folder)
        self.accelerator.wait_for_everyone()
        return Path(folder).expanduser()

    def push_to_hub(
        self,
        repo_id: str,
        queries: Queries | None = None,
        stages: Iterable[str] | None = None,
        k: int = 10,
        *,
        include_rows: bool | None = None,
        private: bool | None = None,
        source_datasets: str | Mapping[str, str] | None = None,
        max_columns: int = 100,
        shaded: int | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload attribution",
    ) -> str:
        """Publish scores as a dataset repository, in one commit, with a card that explains every column.

        Its configs: `default` (rows, `source_row` and scores, one split per stage), `scores` (lists instead of many
        columns), `top_influences`, `queries` and `token_influences`. `hf_source.load_attribution(repo_id)` gives all
        of it back. Queries are always published, with their texts; what a model generated may repeat rows it was
        trained on.

        Args:
            repo_id: `"user/name"`; made if it does not exist. Of a card that is there, only `configs` and the section
                between the markers change.
            queries: what is explained; by default the queries last attributed.
            stages: names; by default those attributed with these queries, or all.
            k: rows per query, stage and direction in `top_influences`.
            include_rows: publish the rows, with all their columns; else numbers and scores, and no text of theirs. By
                default only rows of stages for which `source_datasets` names a dataset that anybody can read.
            private: make the repository private. By default it is, unless the rows of every stage come from datasets
                on the Hub that anybody can read (and the record too, if it comes from the Hub).
            source_datasets: id of the dataset on the Hub that the rows come from, or stage -> id. By default what the
                datasets say themselves, which counts for `private` and the card, not for `include_rows`.
            max_columns: with more queries than this, scores are a list per row.
            shaded: answers whose tokens are scored too, with those of their strongest rows, so that a report of what
                is shared is shaded; the first ones, see `report`. By default what a report of these queries has
                scored already goes along; 0 for none. Texts of rows only where the rows go along.
            token: what authenticates; default the one of `hf auth login`.
            revision: branch to push to; made if it does not exist.
            commit_message: of the commit.

        Returns:
            Address of the commit (of several processes, on the main one).

        Raises:
            ConfigError: if nothing was attributed and no queries are given, or a repository that is to be private
                exists and is public.
            DataError: if the Hub refuses.
        """
        from ..outputs.sharing import push_attribution

        return push_attribution(
            self,
            repo_id,
            queries,
            stages,
            k,
            include_rows=include_rows,
            private=private,
            source_datasets=source_datasets,
            max_columns=max_columns,
            shaded=shaded,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )

    def report(
        self,
        path: str | Path,
        queries: Queries | None = None,
        stages: Iterable[str] | None = None,
        k: int = 5,
        *,
        title: str | None = None,
        columns: Iterable[str] | None = None,
        shaded: int = 8,
    ) -> Path:
        """Write what is to be said of some answers as one HTML file, which needs neither network nor script.

        It shows each answer with its strongest rows, both shaded by the influence of their tokens; how scores are
        distributed; the shares of stages and of the values of columns; how far to trust it all; and the settings.

        Args:
            path: file to write, ending in `.html`.
            queries, stages: see `push_to_hub`; of given datasets see `set_dataset`.
            k: rows shown per answer, stage and direction.
            title: heading.
            columns: of the datasets, whose values make groups; by default those that look like labels or sources.
            shaded: answers whose tokens are shaded, the first ones; where `memory_budget` has no room for them, that
                takes one walk more. 0 for none.

        Returns:
            The path.

        Raises:
            ConfigError: if nothing was attributed and no queries are given.
            DataError: if no stage has one of the columns.
        """
        from ..outputs.report import report_of

        return report_of(self, path, queries, stages, k, title=title, columns=columns, shaded=shaded)
