"""What `qimera` offers; `__init__.py` imports each name when it is first used."""

__version__: str

from .assessment.data import (
    LabelledImages as LabelledImages,
    load_labelled_images as load_labelled_images,
)
from .assessment.diagnostics import (
    Diagnosis as Diagnosis,
    diagnose as diagnose,
)
from .assessment.estimation import (
    Estimate as Estimate,
    estimate_drop as estimate_drop,
)
from .assessment.evaluation import (
    Evaluation as Evaluation,
    evaluate as evaluate,
)
from .assessment.selection import choose as choose
from .assessment.unlabelled import load_images as load_images
from .config.input_spec import InputSpec as InputSpec
from .config.recipe_names import RECIPE_NAMES as RECIPE_NAMES
from .config.recipes import Recipe as Recipe, recipe as recipe
from .config.run_settings import RunSettings as RunSettings
from .config.settings import (
    DirectSettings as DirectSettings,
    DistillationSettings as DistillationSettings,
    GeneratorSettings as GeneratorSettings,
    LabelSettings as LabelSettings,
    LayerBits as LayerBits,
    QuantizationSettings as QuantizationSettings,
    SynthesisSettings as SynthesisSettings,
)
from .errors import (
    ConfigError as ConfigError,
    DivergenceError as DivergenceError,
    QimeraError as QimeraError,
    UnsupportedModelError as UnsupportedModelError,
    VerificationError as VerificationError,
)
from .export.comparison import (
    Comparison as Comparison,
    Verification as Verification,
)
from .export.coreml import export_coreml as export_coreml
from .export.executorch import export_executorch as export_executorch
from .export.onnx import export_onnx as export_onnx
from .export.program import (
    export_aotinductor as export_aotinductor,
    export_pt2 as export_pt2,
)
from .litert.export import export_litert as export_litert
from .litert.micro import export_tflm as export_tflm
from .machine.progress import Progress as Progress
from .mixed_precision.allocation import (
    Allocation as Allocation,
    allocate_bits as allocate_bits,
)
from .mixed_precision.sensitivity import (
    Sensitivity as Sensitivity,
    measure_sensitivity as measure_sensitivity,
)
from .pipeline import (
    quantize as quantize,
    quantize_with as quantize_with,
    synthesize as synthesize,
)
from .runs.loading import LoadedRun as LoadedRun, load as load
from .student.student import Student as Student
from .synthesis.bank import SampleBank as SampleBank
from .teacher.sources import EMBEDDED_MODELS as EMBEDDED_MODELS, load_model as load_model
from .teacher.teacher import Teacher as Teacher
