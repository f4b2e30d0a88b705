"""The stages that make and measure the edits of a job, one class each."""

from dataclasses import replace

import slsgu_cli as slsgu
from slsgu_cli import Artifact
from slsgu_cli.records.codec import decode, digest, encode
from slsgu_cli.records.ledger import MeasuredModel, StageKind
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.verification import ATTACK, ATTACKED
from slsgu_cli.removals.job import Job, options_digest
from slsgu_cli.removals.recipe import Together
from slsgu_cli.removals.stage import ArtifactStage, Stage


class SetStage(ArtifactStage):
    """Build the set of a request."""

    kind, artifact = StageKind.SET, Artifact.SET

    def request(self, job: Job) -> BuildRequest:
        """Return how to build the set."""
        return job.recipe.set_of(job.recipe.request(self.names[0]))

    def inputs(self, job: Job) -> dict[str, str]:
        """Return digests of the options, the sources and the weights. Raises InputError."""
        request = self.request(job)
        return {
            "options": digest(encode(request)),
            "sources": slsgu.source_digest(request, job.identities),
            "weights": job.weights,
        }

    def output(self, job: Job) -> str:
        """Return a digest of how the set was built, without rows dropped by hand."""
        built = job.record(Artifact.SET, self.names[0]).request
        request = decode(BuildRequest, built) if built else None
        return digest(encode(replace(request, dropped={})) if request else None)

    def run(self, job: Job) -> None:
        """Build the set. Rows that were dropped by hand stay out."""
        request = self.request(job)
        manifest = job.catalog.get(Artifact.SET, request.name)
        if manifest is not None and manifest.concept == request.concept and manifest.request:
            dropped = decode(BuildRequest, manifest.request).dropped
            request = replace(request, dropped=dropped)
        slsgu.build_sets(job.store, request)


class GradientStage(ArtifactStage):
    """Compute the gradients of a request."""

    kind, artifact = StageKind.GRADIENTS, Artifact.POINTER

    def inputs(self, job: Job) -> dict[str, str]:
        """Return digests of the options, the rows and the weights."""
        manifest = job.record(Artifact.SET, self.names[0])
        return {
            "options": options_digest(job.recipe.grad),
            "rows": digest([manifest.forget.fingerprint, manifest.retain.fingerprint]),
            "weights": job.weights,
        }

    def run(self, job: Job) -> None:
        """Compute the gradients."""
        slsgu.compute_gradients(job.store, self.names[0], options=job.recipe.grad)


class RankingStage(ArtifactStage):
    """Rank the layers for a request."""

    kind, artifact = StageKind.RANKING, Artifact.RANKING

    def inputs(self, job: Job) -> dict[str, str]:
        """Return digests of the options and of the gradients."""
        pointer = job.record(Artifact.POINTER, self.names[0])
        return {
            "options": options_digest(job.recipe.rank),
            "gradients": digest([pointer.forget, pointer.retain, pointer.retain_data]),
        }

    def run(self, job: Job) -> None:
        """Rank the layers."""
        slsgu.rank(job.store, self.names[0], options=job.recipe.rank)


class SearchStage(ArtifactStage):
    """Search for the edit of a request, or jointly for those of several."""

    kind, artifact = StageKind.SEARCH, Artifact.EDIT

    def earlier(self, job: Job) -> tuple[str, ...]:
        """Return the requests whose edits are in place during the search."""
        names = job.recipe.names
        if job.recipe.together is not Together.AFTER:
            return ()
        return names[: names.index(self.names[0])]

    def inputs(self, job: Job) -> dict[str, str]:
        """Return digests of the options, the rankings, the evaluation sets and earlier edits."""
        rankings = [job.digest(Artifact.RANKING, name) for name in self.names]
        return {
            "requests": digest(self.names),
            "options": digest([job.recipe.together, options_digest(job.recipe.search)]),
            "ranking": digest(rankings),
            "evaluation rows": job.evaluation_rows(self.names),
            "earlier edits": job.edits(self.earlier(job)),
        }

    def run(self, job: Job) -> None:
        """Search for the edit."""
        options = job.recipe.search
        if len(self.names) > 1:
            slsgu.joint_search(job.store, self.names, options=options)
        else:
            after = self.earlier(job)
            slsgu.search(job.store, self.names[0], options=replace(options, after=after))


class EvaluationStage(Stage):
    """Measure the written model, or the original with all edits in place."""

    kind = StageKind.FIGURES

    def inputs(self, job: Job) -> dict[str, str]:
        """Return digests of the written model and of the evaluation sets."""
        return job.measured_inputs(self.names)

    def output(self, job: Job) -> str:
        """Return a digest of the figures in the ledger."""
        return digest(job.ledger.written.figures if job.ledger.written else None)

    def run(self, job: Job) -> None:
        """Measure the model and enter the figures in the ledger."""
        device = job.recipe.search.device
        result = slsgu.evaluate(job.store, self.names, model=job.recipe.written, device=device)
        original, written = result.models[0], result.models[-1]
        rows = [
            replace(
                job.row(name),
                before=original.forget[name],
                after=written.forget[name],
                layer=job.record(Artifact.EDIT, name).layer,
            )
            for name in self.names
        ]
        figures_before = replace(result, models=result.models[:1]).figures()
        job.ledger = replace(
            job.ledger.with_rows(rows),
            original=MeasuredModel(figures_before, original.utility),
            written=MeasuredModel(result.figures(), written.utility),
        )


class VerificationStage(ArtifactStage):
    """Run the checks of a request on the written model."""

    kind, artifact = StageKind.VERIFICATION, Artifact.VERIFICATION

    def inputs(self, job: Job) -> dict[str, str]:
        """Return digests of the options, the written model and the evaluation sets."""
        options = options_digest(job.recipe.verification_of(self.names[0]))
        return {"options": options, **job.measured_inputs(self.names)}

    def run(self, job: Job) -> None:
        """Run the checks and enter the gain of each attack in the ledger."""
        (name,) = self.names
        verified = slsgu.verify(job.store, name, job.recipe.verification_of(name))
        gains = {
            f"{ATTACK}{row.check}": row.gain
            for row in slsgu.verdict_rows(*verified.models[:2])
            if row.check in ATTACKED
        }
        job.ledger = job.ledger.with_rows([replace(job.row(name), attacks=gains)])
