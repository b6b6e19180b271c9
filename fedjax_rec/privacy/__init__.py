"""Mechanisms, accounting, calibration, ledger and budget."""

from fedjax_rec.privacy.accounting import PrivacySpent as PrivacySpent
from fedjax_rec.privacy.accounting import delta_warning as delta_warning
from fedjax_rec.privacy.accounting import privacy_spent as privacy_spent
from fedjax_rec.privacy.calibration import Calibration as Calibration
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier as calibrate_noise_multiplier
from fedjax_rec.privacy.calibration import max_rounds as max_rounds
from fedjax_rec.privacy.curve import epsilon_curve as epsilon_curve
from fedjax_rec.privacy.ledger import Budget as Budget
from fedjax_rec.privacy.ledger import BudgetExceeded as BudgetExceeded
from fedjax_rec.privacy.ledger import Ledger as Ledger
from fedjax_rec.privacy.ledger import affordable_rounds as affordable_rounds
