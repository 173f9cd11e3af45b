// The parameters of a chat completion as the server's own description (GET /openapi.json) has them.

/** What the rest of the page needs to know of the server. `spec` is the OpenAPI document, big numbers as BigInt. */
export function readSpec(spec) {
  const schemas = spec.components.schemas;
  const { properties } = schemas.ChatRequest;
  const { fields, refused } = fieldsOf(schemas, properties, "");
  return {
    fields,
    refused,
    wantsKey: "securitySchemes" in spec.components,
    model: properties.model.default ?? null,
    roles: schemas.Message.properties.role.enum,
    example: properties.messages.examples?.[0]?.[0]?.content ?? "",
    templateArguments: properties.reasoning_effort["x-template-arguments"],
  };
}

function fieldsOf(schemas, properties, prefix) {
  const fields = [];
  const refused = [];
  for (const [name, property] of Object.entries(properties)) {
    const path = prefix + name;
    if (path === "messages") continue;
    const forms = formsOf(schemas, property);
    const typed = forms.filter((form) => form.type || form.properties);
    if (!typed.length) {
      refused.push(path); // known by name, and only values that ask for nothing are taken
    } else if (typed.length === 1 && typed[0].properties) {
      fields.push(...fieldsOf(schemas, typed[0].properties, `${path}.`).fields);
    } else {
      fields.push(fieldOf(path, property, typed));
    }
  }
  return { fields, refused };
}

/** The forms a property can have, references followed; null, which means absent, is none. */
function formsOf(schemas, property) {
  if (property.$ref) return formsOf(schemas, schemas[property.$ref.split("/").at(-1)]);
  const alternatives = property.anyOf ?? property.oneOf;
  if (alternatives) return alternatives.flatMap((form) => formsOf(schemas, form));
  const type = [property.type].flat().find((name) => name && name !== "null");
  return property.type === "null" ? [] : [{ ...property, type }];
}

function fieldOf(path, property, forms) {
  const form = forms[0];
  const options = (property.enum ?? form.enum)?.filter((value) => value !== null);
  return {
    path,
    kind: kindOf(forms, options),
    options,
    default: property.default ?? null,
    minimum: property.minimum ?? form.minimum,
    maximum: property.maximum ?? form.maximum,
    description: property.description ?? "",
  };
}

function kindOf(forms, options) {
  const types = new Set(forms.map((form) => form.type));
  if (types.size === 2 && types.has("string") && types.has("array")) return "lines";
  if (types.size > 1) return "json";
  if (options) return "choice";
  return { boolean: "boolean", integer: "integer", number: "number", string: "text" }[forms[0].type] ?? "json";
}

/** A field's range in words, "" if it has none. */
export function rangeOf({ minimum, maximum }) {
  if (minimum !== undefined && maximum !== undefined) return `${minimum} to ${maximum}`;
  if (minimum !== undefined) return `from ${minimum}`;
  return maximum === undefined ? "" : `up to ${maximum}`;
}
