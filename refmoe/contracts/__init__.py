# SPDX-License-Identifier: Apache-2.0
"""What all contracts share: laws, examples, verdicts, reports and pytest items. It knows no router and no kernel."""
