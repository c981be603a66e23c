// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sections of a man page that are not part of the definition of the command line.

use clap_mangen::roff::{Roff, bold, roman};

/// Adds a section of terms, such as files, each with its meaning.
pub fn terms<T: Into<String>, M: Into<String>>(
    page: &mut Roff,
    title: &str,
    terms: impl IntoIterator<Item = (T, M)>,
) {
    page.control("SH", [title]);
    for (term, meaning) in terms {
        page.control("TP", []);
        page.text([bold(term)]);
        page.text([roman(meaning)]);
    }
}

/// Adds the section that refers to other pages, each by its name and number.
pub fn see_also(page: &mut Roff, pages: &[(&str, u8)]) {
    let mut line = Vec::new();
    for (name, number) in pages {
        if !line.is_empty() {
            line.push(roman(", "));
        }
        line.extend([bold(*name), roman(format!("({number})"))]);
    }
    page.control("SH", ["SEE ALSO"]);
    page.text(line);
}
