"""A recipe: one YAML file from a trained model to a smaller one that is measured, saved and exported."""

from tersor.recipe.catalogue import Catalogue as Catalogue
from tersor.recipe.catalogue import catalogue as catalogue
from tersor.recipe.deployment import Deployed as Deployed
from tersor.recipe.deployment import deploy as deploy
from tersor.recipe.imports import import_object as import_object
from tersor.recipe.prepare import Data as Data
from tersor.recipe.prepare import Prepared as Prepared
from tersor.recipe.prepare import build_data as build_data
from tersor.recipe.prepare import build_model as build_model
from tersor.recipe.prepare import prepare as prepare
from tersor.recipe.pruner import Algorithm as Algorithm
from tersor.recipe.run import RunResult as RunResult
from tersor.recipe.run import run_recipe as run_recipe
from tersor.recipe.spec import Deployment as Deployment
from tersor.recipe.spec import FineTuning as FineTuning
from tersor.recipe.spec import ModelSource as ModelSource
from tersor.recipe.spec import Output as Output
from tersor.recipe.spec import Pruning as Pruning
from tersor.recipe.spec import Recipe as Recipe
from tersor.recipe.spec import Recovery as Recovery
from tersor.recipe.spec import Schedule as Schedule
from tersor.recipe.spec import read_recipe as read_recipe
from tersor.recipe.words import describe as describe
